"""What a checkpoint says about text and pictures: configuration, tokens, chat templates, processing."""
