#!/bin/sh
# The native API and the OpenAI-compatible one, by curl.
#
#     chatstream serve
#
# In another terminal:
#
#     sh examples/curl.sh http://127.0.0.1:8000
#
# Prints an answer as events, one in the format of ChatStream 0.3, one in OpenAI's format, and the server's load.
set -eu
url=${1:-http://127.0.0.1:8000}

echo "--- events"
curl -sfN "$url/chat_stream" -H "Accept: text/event-stream" -d '{"user_input": "Hello", "max_new_tokens": 5}'

echo "--- ChatStream 0.3"
curl -sfN "$url/chat_stream" -d '{"user_input": "Hello", "max_new_tokens": 5}'

echo
echo "--- OpenAI"
model=$(curl -sf "$url/v1/models" | sed 's/.*"id":"\([^"]*\)".*/\1/')
curl -sf "$url/v1/chat/completions" -d '{
  "model": "'"$model"'",
  "messages": [{"role": "user", "content": "Hello"}],
  "max_completion_tokens": 5
}'

echo
echo "--- load"
curl -sf "$url/get_load"
