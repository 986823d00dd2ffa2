# Reads an issue from the code host.
exec curl --silent --show-error --fail --max-time 5 http://192.0.2.10/issues/17.json
