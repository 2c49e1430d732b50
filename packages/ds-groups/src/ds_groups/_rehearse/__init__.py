"""What a layout will make and cost, before it starts: figures, pictures, advice and the command. No torch."""
