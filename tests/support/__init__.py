"""What tests share: real servers, rings and engines to talk to, and references to compare with."""
