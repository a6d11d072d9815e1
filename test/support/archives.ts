// Tars of images as several programs make them, entry by entry, so that tests can change any of it.
import { digestOf, type TestContent, type TestImage, type TestLayer, writeTar } from "./image.ts";
import { blobName } from "./pull.ts";

export const hexOf = (digest: string): string => digest.slice(digest.indexOf(":") + 1);

export type Entry = [
  name: string,
  content:
    | Buffer
    | string
    | { symlink: string }
    | { hardlink: string }
    | { folder: true }
    | { type: string }
    | { raw: Buffer }, // header and all
];

function typeAndTarget(
  content: Exclude<Entry[1], Buffer | string | { raw: Buffer }>,
): [string, string] {
  if ("type" in content) return [content.type, ""];
  if ("folder" in content) return ["5", ""];
  return "symlink" in content ? ["2", content.symlink] : ["1", content.hardlink];
}

/** A tar as other programs make it, with links and folders. */
export function tarOf(entries: Entry[]): Buffer {
  const parts = entries.map(([name, content]) => {
    if (typeof content === "string" || Buffer.isBuffer(content)) {
      return writeTar([[name, Buffer.from(content)]]).subarray(0, -1024);
    }
    if ("raw" in content) return content.raw;
    const header = writeTar([[name, Buffer.alloc(0)]]).subarray(0, 512);
    const [type, target] = typeAndTarget(content);
    header.write(type, 156);
    header.write(target, 157);
    header.write(" ".repeat(8), 148);
    const sum = header.reduce((total, byte) => total + byte, 0);
    header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
    return header;
  });
  return Buffer.concat([...parts, Buffer.alloc(1024)]);
}

/** A header with anything in it, and what belongs to it. */
export interface RawEntry {
  name: string;
  /** Default a file, "0". */
  type?: string;
  link?: string;
  content?: Buffer | string;
  /** The records of an extended header before it. */
  pax?: Record<string, Buffer | string>;
  /** Last changes, before the checksum. */
  edit?: (header: Buffer) => void;
}

const toBlocks = (bytes: Buffer): Buffer =>
  Buffer.concat([bytes, Buffer.alloc(-bytes.length & 511)]);

export function paxRecord(key: string, value: Buffer | string): Buffer {
  const rest = Buffer.concat([` ${key}=`, value, "\n"].map((part) => Buffer.from(part as string)));
  let length = rest.length;
  while (length !== rest.length + String(length).length) length += 1;
  return Buffer.concat([Buffer.from(String(length)), rest]);
}

export function rawEntry({ name, type, link, content = "", pax, edit }: RawEntry): Buffer {
  const bytes = Buffer.from(content as string);
  const header = writeTar([["", bytes]]).subarray(0, 512);
  header.write(name, 0);
  header.write(type ?? "0", 156);
  header.write(link ?? "", 157);
  edit?.(header);
  header.write(" ".repeat(8), 148);
  const sum = header.reduce((total, byte) => total + byte, 0);
  header.write(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
  const records = Object.entries(pax ?? {}).map(([key, value]) => paxRecord(key, value));
  const extension = pax
    ? rawEntry({ name: "PaxHeaders/x", type: "x", content: Buffer.concat(records) })
    : Buffer.alloc(0);
  return Buffer.concat([extension, header, toBlocks(bytes)]);
}

/** A tar of such entries. */
export const rawTar = (...entries: RawEntry[]): Buffer =>
  Buffer.concat([...entries.map(rawEntry), Buffer.alloc(1024)]);

export const json = (value: unknown): string => JSON.stringify(value);

/** An OCI archive of what index.json's entries lead to; `fields` are laid over each entry. */
export function ociArchive(contents: TestContent[], fields: Record<string, unknown> = {}): Entry[] {
  const blobs = new Map(
    contents.flatMap(({ blobs: own, manifests }) => [
      ...own,
      ...[...manifests].map(([digest, { bytes }]): [string, Buffer] => [digest, bytes]),
    ]),
  );
  const manifests = contents.map(({ mediaType, digest, bytes }) => ({
    mediaType,
    digest,
    size: bytes.length,
    ...fields,
  }));
  return [
    ["blobs/", { folder: true }],
    ["blobs/sha256/", { folder: true }],
    ...[...blobs].map(([digest, bytes]): Entry => [blobName(digest), bytes]),
    ["index.json", json({ schemaVersion: 2, manifests })],
    ["oci-layout", json({ imageLayoutVersion: "1.0.0" })],
  ];
}

/** docker save before 25: the same layer a second time is a link to the first. */
export function oldDockerSave(image: TestImage, tags: string[] | null = ["team/app:1.0"]): Entry[] {
  const first = new Map<string, string>();
  const ids = image.layers.map((_, position) => hexOf(digestOf(`v1 id ${position}`)));
  const layers = image.layers.flatMap((layer, position): Entry[] => {
    const known = first.get(layer.digest);
    const name = `${ids[position]}/layer.tar`;
    first.set(layer.digest, known ?? name);
    return [
      [`${ids[position]}/`, { folder: true }],
      [`${ids[position]}/VERSION`, "1.0"],
      [`${ids[position]}/json`, json({ id: ids[position] })],
      [name, known ? { symlink: `../${known}` } : layer.bytes],
    ];
  });
  const config = `${hexOf(image.config.digest)}.json`;
  const manifest = [{ Config: config, RepoTags: tags, Layers: ids.map((id) => `${id}/layer.tar`) }];
  return [
    ...layers,
    [config, image.configBytes],
    ["manifest.json", json(manifest)],
    ["repositories", "{}"],
  ];
}

/**
 * skopeo's docker-archive: plain layers by their own digest, and docker's old names as links to
 * them.
 */
export function skopeoDockerArchive(image: TestImage): Entry[] {
  const name = ({ digest }: TestLayer) => `${hexOf(digest)}.tar`;
  const unique = [...new Map(image.layers.map((layer) => [layer.digest, layer])).values()];
  const config = `${hexOf(image.config.digest)}.json`;
  return [
    ...unique.map((layer): Entry => [name(layer), layer.bytes]),
    [config, image.configBytes],
    ...image.layers.map(
      (layer, at): Entry => [
        `${hexOf(digestOf(`${at}`))}/layer.tar`,
        { symlink: `../${name(layer)}` },
      ],
    ),
    [
      "manifest.json",
      json([
        { Config: config, RepoTags: ["docker.io/team/app:1.0"], Layers: image.layers.map(name) },
      ]),
    ],
  ];
}

/** crane pull: the config under its whole digest, layers as the registry has them. */
export function craneTar(image: TestImage): Entry[] {
  const names = image.layers.map(({ digest }) => `${hexOf(digest)}.tar.gz`);
  const manifest = [{ Config: image.config.digest, RepoTags: ["team/app:1.0"], Layers: names }];
  const layers = new Map(image.layers.map(({ bytes }, at) => [names[at] as string, bytes]));
  return [[image.config.digest, image.configBytes], ...layers, ["manifest.json", json(manifest)]];
}
