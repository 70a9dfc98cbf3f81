"""Integrations with training frameworks: one small module for each, imported only where the framework is."""
