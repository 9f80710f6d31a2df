"""Growth curves: what tagging, tables, stores and clusters cost as the number of clips grows."""
