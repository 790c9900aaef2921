"""Importers: rows of files, databases and traces become events; an audit says beforehand what they hold."""
