"""What reports are made of: colours and figures, pages, files that are whole or not there."""
