"""`python -m train`."""

from cluster.cli import run_app
from train.cli import app

run_app(app)
