// The API's description, read from openapi.json: operations with example answers, and the schemas that they name.
const make = (name, content = "", attributes = {}) => {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...(Array.isArray(content) ? content : [content]));
  return element;
};
/** Text with its `code` as such. */
const prose = (text) => text.split("`").map((piece, i) => (i % 2 ? make("code", piece) : piece));
const where = new URL(".", location.href).href.replace(/\/$/, "");
document.getElementById("example").textContent = [
  `curl -F file=@duet.mp4 -F objects=violin,dog ${where}/v1/separations`,
  `curl -F file=@long.mkv -H 'Prefer: respond-async' ${where}/v1/separations   # 202, and ask its Location`,
  `curl -F file=@duet.mp4 -H 'Accept: application/zip' -o sounds.zip ${where}/v1/separations`,
].join("\n");

const nameOf = (schema) => schema?.$ref?.split("/").pop();

/** Name a schema's type; other schemas are links to theirs. */
function typeOf(schema) {
  if (!schema) return [];
  if (schema.$ref) return [make("a", nameOf(schema), { href: `#${nameOf(schema)}` })];
  if (schema.anyOf) return schema.anyOf.flatMap((s, i) => [...(i ? [" or "] : []), ...typeOf(s)]);
  if (schema.enum) return [schema.enum.map((v) => JSON.stringify(v)).join(", ")];
  if (schema.const) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  if (schema.type === "object" && schema.additionalProperties?.type) return ["name → ", ...typeOf(schema.additionalProperties)];
  return [schema.format === "date-time" ? "time" : schema.format === "binary" ? "bytes" : schema.type ?? ""];
}

function table(rows) {
  const body = make("tbody");
  for (const [left, type, right] of rows) {
    body.append(make("tr", [make("td", make("code", left)), make("td", type), make("td", prose(right ?? ""))]));
  }
  return make("div", make("table", body), { className: "scroll" });
}

const example = (value) => make("details", [make("summary", "Example"), make("pre", make("code", JSON.stringify(value, null, 1)), { tabIndex: 0 })]);

function operation(method, path, described, schemas) {
  const section = make("section", make("h2", [make("b", method.toUpperCase()), make("code", path)]));
  section.append(make("p", prose([described.summary, described.description].filter(Boolean).join(". "))));
  const rows = (described.parameters ?? []).map((p) => [p.name, typeOf(p.schema), `in the ${p.in}${p.description ? `: ${p.description}` : ""}`]);
  for (const content of Object.values(described.requestBody?.content ?? {}))
    for (const [name, p] of Object.entries(content.schema.properties ?? {})) rows.push([name, typeOf(p), p.description]);
  const examples = [];
  for (const [status, answer] of Object.entries(described.responses)) {
    const schema = Object.values(answer.content ?? {})[0]?.schema;
    const kinds = Object.keys(answer.content ?? {}).filter((kind) => !kind.endsWith("json")).join(", ");
    rows.push([status, kinds ? [kinds] : typeOf(schema?.title ? { $ref: schema.title } : schema), answer.description]);
    const one = nameOf(schema) ?? nameOf(schema?.items);
    const [value] = schemas[one]?.examples ?? [];
    if (value && !examples.length) examples.push(example(schema.items ? [value] : value));
  }
  section.append(table(rows), ...examples);
  return section;
}

function schema(name, described) {
  const section = make("section", make("h2", make("code", name)), { id: name });
  section.append(make("p", prose(described.description ?? "")));
  section.append(table(Object.entries(described.properties ?? {}).map(([field, p]) => [field, typeOf(p), p.description])));
  if (described.examples) section.append(example(described.examples[0]));
  return section;
}

const headers = sessionStorage.token ? { Authorization: `Bearer ${sessionStorage.token}` } : {};
const answer = await fetch("openapi.json", { headers });
const box = document.getElementById("operations");
if (!answer.ok) box.append(make("p", `${answer.status}: the description needs this service's token; give it on the first page.`));
else {
  const { paths, components: { schemas } } = await answer.json();
  for (const [path, methods] of Object.entries(paths))
    for (const [method, described] of Object.entries(methods)) box.append(operation(method, path, described, schemas));
  box.append(make("h2", "What is answered", { className: "part" }));
  const problem = Object.values(paths).flatMap(Object.values).flatMap((o) => Object.values(o.responses))
    .map((r) => r.content?.["application/problem+json"]?.schema).find(Boolean);
  const all = { ...schemas, ...(problem && { [problem.title]: problem }) };
  for (const name of ["Job", "Result", "SeparatedObject", "Audio", ...Object.keys(all)]) {
    if (all[name] && !document.getElementById(name) && !/ValidationError$/.test(name)) box.append(schema(name, all[name]));
  }
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
