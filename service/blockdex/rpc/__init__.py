"""The gRPC front door: protobuf in, plain messages to the channel, protobuf out. Never touches torch."""
