"""A page to try the model in the browser: no library, nothing from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>irc</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  #talk > div { white-space: pre-wrap; padding: .5rem .8rem; margin: .5rem 0; border-radius: .5rem; }
  .user { background: #e8f0fe; } .assistant { background: #f4f4f4; font-family: ui-monospace, monospace; }
  .error { background: #fdecea; }
  form { display: flex; gap: .5rem; flex-wrap: wrap; }
  textarea { flex: 1 1 100%; min-height: 4.5rem; font: inherit; padding: .5rem; }
  label { font-size: .85rem; } input[type=number] { width: 5rem; }
</style>
<h1>irc</h1>
<div id="talk"></div>
<form>
  <textarea name="text" placeholder="Say something, or begin a text to be continued" required></textarea>
  <label><input type="checkbox" name="chat" checked> chat</label>
  <label>tokens <input type="number" name="tokens" value="128" min="1"></label>
  <label>temperature <input type="number" name="temperature" value="0.7" min="0" max="2" step="0.1"></label>
  <label>key <input type="password" name="key" autocomplete="off"></label>
  <button>Send</button> <button type="button" id="stop">Stop</button>
</form>
<script>
const form = document.forms[0], talk = document.getElementById('talk');
let messages = [], abort = null;
function say(role, text) {
  const div = document.createElement('div');
  div.className = role; div.textContent = text; talk.append(div);
  return div;
}
document.getElementById('stop').onclick = () => abort && abort.abort();
form.onsubmit = async (e) => {
  e.preventDefault();
  const text = form.text.value, chat = form.chat.checked;
  say('user', text); form.text.value = '';
  const sent = [...messages, {role: 'user', content: text}];
  const body = {stream: true, max_tokens: +form.tokens.value, temperature: +form.temperature.value};
  if (chat) body.messages = sent; else body.prompt = text;
  const headers = {'Content-Type': 'application/json'};
  if (form.key.value) headers.Authorization = 'Bearer ' + form.key.value;
  const div = say('assistant', '');
  abort = new AbortController();
  try {
    const path = chat ? '/v1/chat/completions' : '/v1/completions';
    const response = await fetch(path, {method: 'POST', headers, body: JSON.stringify(body), signal: abort.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split('\\n\\n');
      rest = lines.pop();
      for (const line of lines) {
        const data = line.replace(/^data: /, '');
        if (data === '[DONE]') continue;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new Error(parsed.error.message);
        for (const c of parsed.choices) div.textContent += chat ? (c.delta.content || '') : c.text;
      }
    }
  } catch (error) { if (error.name !== 'AbortError') say('error', error.message); }
  // What failed before its first word was not said: the text can be sent again.
  if (!div.textContent) { div.remove(); form.text.value ||= text; }
  else if (chat) messages = [...sent, {role: 'assistant', content: div.textContent}];
};
</script>
</html>
"""
