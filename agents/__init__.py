"""The agents, and what belongs to each: its input for `generate`, its check for `audit`, its pages on the web.

Every module of this package is imported when the app starts. Delete ours, add yours.
"""
