"""`python -m cleangpt` is `cleangpt`, so that a launcher such as torchrun can start it as a module."""

from cleangpt.commands import program

program()
