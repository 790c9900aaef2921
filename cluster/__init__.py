"""What everything stands on: settings, errors, database, Ray session, registry, jobs, command line."""
