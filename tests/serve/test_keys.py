import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from cluster.errors import InputError, NotFoundError
from cluster.tables import api_keys
from serve.keys import KeyRing, create_key, list_keys, revoke_key


def test_ring_finds_a_key_by_its_secret_and_knows_its_rights(database: Engine) -> None:
    secret = create_key(database, "ann", "acme", "main", ["chat"])
    key = KeyRing.read(database).find(secret)
    assert key is not None
    assert (key.name, key.tenant, key.workspace, key.may("chat"), key.may("feedback")) == (
        "ann",
        "acme",
        "main",
        True,
        False,
    )
    assert KeyRing.read(database).find(secret + "x") is None
    assert KeyRing().find(secret) is None


def test_secret_is_not_stored(database: Engine) -> None:
    secret = create_key(database, "ann", "acme", "main")
    with database.connect() as connection:
        row = connection.execute(sa.select(api_keys)).mappings().one()
    assert secret.startswith("rl-")
    assert secret not in str(dict(row))


def test_revoked_and_expired_keys_open_nothing(database: Engine) -> None:
    secret = create_key(database, "ann", "acme", "main")
    expired = create_key(database, "bob", "acme", "main", lifetime_s=-1)
    revoke_key(database, list_keys(database)[0].key_id)
    ring = KeyRing.read(database)
    assert (ring.find(secret), ring.find(expired)) == (None, None)


def test_unknown_scope_and_unknown_key_say_what_is_known(sqlite_database: Engine) -> None:
    with pytest.raises(InputError, match="must be some of chat, feedback"):
        create_key(sqlite_database, "ann", "acme", "main", ["root"])
    create_key(sqlite_database, "ann", "acme", "main")
    with pytest.raises(NotFoundError, match="ann"):
        revoke_key(sqlite_database, "nope")
