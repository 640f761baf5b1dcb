"""From a setting to finished runs."""
