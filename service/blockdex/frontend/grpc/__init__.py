"""The gRPC frontend: protobuf in, plain messages to the channel, protobuf out. Never touches torch."""
