"""Whether the ranks of a running job sit where they should: find them, examine them, judge them."""
