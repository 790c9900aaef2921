"""The live side: router, engines, grader, experiments, rollouts."""
