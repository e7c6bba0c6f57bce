"""Commands beside serving: a self-test, sizes, pictures of traces, tables of options."""
