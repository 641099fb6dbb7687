"""The controller: registry, identities, certificate authority, and the streams that tell nodes what to do."""
