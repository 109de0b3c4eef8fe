"""A bundle is a directory: a model with a contract. A ``.zip`` is its transport form."""
