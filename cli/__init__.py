"""The command line: one file per verb, each thin: parse, call, print."""
