"""`python -m tune`."""

from cluster.cli import run_app
from tune.cli import app

run_app(app)
