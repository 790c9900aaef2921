"""The OpenAPI document: a file for each group of routes, with schemas made from the models that check requests."""
