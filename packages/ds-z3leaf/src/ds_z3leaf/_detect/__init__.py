"""What makes a module a mixture of experts: the experts, their router, and the source that calls them."""
