"""Named studies: many short runs with seeds, stored cell by cell, and what follows from them.

A study is a list of cells (pair × variant × seed). Imports go one way:

    plan, settings, looks → runner, results → headline, catalog → statistics, tables, figures → sections
    → report, claims, summary → findings
"""
