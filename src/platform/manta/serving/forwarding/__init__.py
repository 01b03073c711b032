"""A request sent on to another address, and the answer that streams back."""
