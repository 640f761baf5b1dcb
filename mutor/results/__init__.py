"""Evidence from finished runs: records, statistics, tables, figures, claims. No torch."""
