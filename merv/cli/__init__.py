"""The command line, one module a command; `main` has the table of them."""
