"""Report: the HTML page about runs, evaluations and studies, its charts and its markup."""
