"""What is told of requests: metrics, traces, and how each replica fares."""
