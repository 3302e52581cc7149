"""The routes, a module each; every one lists its own in `ROUTES`, with their scopes."""
