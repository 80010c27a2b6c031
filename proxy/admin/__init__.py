"""The admin port: HTTP for operators."""
