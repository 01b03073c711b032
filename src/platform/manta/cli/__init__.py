"""The `manta` command, one file for each subcommand: parse, call, print."""
