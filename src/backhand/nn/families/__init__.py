"""Model families: their Hugging Face configurations, parsed to the configuration of the one decoder."""
