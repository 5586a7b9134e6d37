"""Tables, encoder, decoder, and the retriever that joins them."""
