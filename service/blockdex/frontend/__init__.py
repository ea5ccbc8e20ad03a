"""What clients meet: gRPC and HTTP in front of the ring. Never imports torch."""
