"""How long the requests of a plan take, by formula."""
