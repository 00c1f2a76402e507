"""Rows and text: data files, conversations, chat templates, documents."""
