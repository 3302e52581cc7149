"""`python -m cope_lc`: the command line."""

from cope_lc.main import app

app()
