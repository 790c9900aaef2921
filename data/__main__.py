"""`python -m data`: the commands of this folder."""

from cluster.cli import run_app
from data.cli import app

run_app(app)
