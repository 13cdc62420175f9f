"""`python -m diffusers_ext`."""

from .cli import app

app(prog_name="diffusers-ext")
