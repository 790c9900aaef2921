"""`python -m train.evaluate`."""

from cluster.cli import run_app
from train.evaluate.cli import app

run_app(app)
