"""The embedded demo model: trained weights, tokenizer and licences, with the scripts that made them (corpus, train)."""
