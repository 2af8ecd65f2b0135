"""What is trained: configuration, target matching, injection into any module, PEFT's files."""
