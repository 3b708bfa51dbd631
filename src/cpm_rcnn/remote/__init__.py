"""Remote files by URL: addresses, requests that are repeated, a bounded local cache, and zip archives."""
