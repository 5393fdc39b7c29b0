// The API's description, read from openapi.json.
const make = (name, text = "", attributes = {}) => {
  const element = Object.assign(document.createElement(name), attributes);
  element.textContent = text;
  return element;
};
const where = new URL(".", location.href).href.replace(/\/$/, "");
document.getElementById("example").textContent = [
  `curl -F file=@duet.mp4 -F objects=violin,dog ${where}/v1/separations`,
  `curl -F file=@long.mkv -H 'Prefer: respond-async' ${where}/v1/separations   # 202, and ask its Location`,
].join("\n");

const headers = sessionStorage.token ? { Authorization: `Bearer ${sessionStorage.token}` } : {};
const answer = await fetch("openapi.json", { headers });
const box = document.getElementById("operations");
if (!answer.ok) box.append(make("p", `${answer.status}: the description needs this service's token; give it on the first page.`));
else {
  for (const [path, methods] of Object.entries((await answer.json()).paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const section = make("section");
      const title = make("h2");
      title.append(make("b", method.toUpperCase()), make("code", path));
      section.append(title, make("p", [operation.summary, operation.description].filter(Boolean).join(". ")));
      const table = make("table");
      const row = (left, right) => {
        const line = make("tr");
        const first = make("td");
        first.append(make("code", left));
        line.append(first, make("td", right));
        table.append(line);
      };
      for (const p of operation.parameters ?? []) row(p.name, `in the ${p.in}`);
      for (const content of Object.values(operation.requestBody?.content ?? {}))
        for (const [name, p] of Object.entries(content.schema.properties ?? {}))
          row(name, p.description ?? (p.enum ? `one of ${p.enum.join(", ")}` : ""));
      for (const [status, r] of Object.entries(operation.responses)) row(status, r.description ?? "");
      section.append(table);
      box.append(section);
    }
  }
}
