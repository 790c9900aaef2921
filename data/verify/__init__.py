"""Verifying: is the log, in the database and in its sealed days, what was written?"""
