"""The command line: thin, one file a verb. It parses, calls one use-case and prints what came back."""
