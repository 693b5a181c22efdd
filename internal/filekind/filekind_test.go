package filekind_test

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"unicode/utf16"

	"derpd/internal/filekind"
	"derpd/internal/testkit"
)

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func wide(text string, order func(unit uint16) []byte) []byte {
	var out []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		out = append(out, order(unit)...)
	}
	return out
}

func little(unit uint16) []byte { return []byte{byte(unit), byte(unit >> 8)} }
func big(unit uint16) []byte    { return []byte{byte(unit >> 8), byte(unit)} }

// shell runs a command of a message in a directory, without a terminal, so that
// openssl reads a passphrase from input.
func shell(t *testing.T, dir, command, input string) {
	t.Helper()
	program, _, _ := strings.Cut(strings.TrimPrefix(command, "LC_ALL=C "), " ")
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("%s is not installed", program)
	}
	run := exec.CommandContext(t.Context(), "sh", "-c", command)
	run.Dir, run.Stdin = dir, strings.NewReader(input)
	run.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if out, err := run.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

var commands = regexp.MustCompile("`([^`]*)`")

// openssl makes a file of input with the real program.
func openssl(t *testing.T, input []byte, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("openssl is not installed")
	}
	run := exec.CommandContext(t.Context(), "openssl", args...)
	run.Stdin = bytes.NewReader(input)
	out, err := run.Output()
	if err != nil {
		t.Fatal(errors.Join(err, errors.New(strings.Join(args, " "))))
	}
	return out
}

// Each file has its message, and the command in the message makes PEM of it. F
// stands for the path of the file, and S for the path without its extension.
func TestKinds(t *testing.T) {
	root := testkit.NewAuthority(t)
	leaf := testkit.NewCertificate(t, testkit.Certificate{Names: []string{"derp.example.com"}, Issuer: root})
	chain, key := testkit.ChainPEM(leaf, root), testkit.KeyPEM(t, leaf)
	der := leaf.Certificate[0]
	keyBlock, _ := pem.Decode(key)
	text := string(chain)
	both := append(bytes.Clone(chain), key...)
	join := func(parts ...string) []byte { return []byte(strings.Join(parts, "")) }
	one := string(testkit.ChainPEM(leaf))
	for _, tt := range []struct {
		name   string
		data   func(t *testing.T) []byte
		want   string
		blocks int // after the command; 0 if the message has no command
	}{
		{"good", func(*testing.T) []byte { return chain }, "", 2},
		{"Windows line ends", func(*testing.T) []byte { return []byte(strings.ReplaceAll(text, "\n", "\r\n")) }, "", 2},
		{"text around the blocks", func(*testing.T) []byte { return join("Bag Attributes\n", one, "subject=x\n", one, "end") }, "", 2},
		{"empty", func(*testing.T) []byte { return nil }, "F is empty; write the file again", 0},
		{"blank", func(*testing.T) []byte { return []byte(" \r\n\n") }, "F is empty; write the file again", 0},
		{"byte order mark", func(*testing.T) []byte { return join("\xef\xbb\xbf", text) }, "F has a byte order mark; run `LC_ALL=C sed -i 's/\\xef\\xbb\\xbf//g' F`", 2},
		{"two byte order marks", func(*testing.T) []byte { return join("\xef\xbb\xbf", one, "\xef\xbb\xbf", one) }, "F has a byte order mark; run `LC_ALL=C sed -i 's/\\xef\\xbb\\xbf//g' F`", 2},
		{"UTF-16 of PowerShell", func(*testing.T) []byte { return append([]byte("\xff\xfe"), wide(text, little)...) }, "F is in UTF-16; run `iconv -f UTF-16 -t UTF-8 F > F.new && cp F.new F && rm F.new`", 2},
		{"UTF-16, big endian", func(*testing.T) []byte { return append([]byte("\xfe\xff"), wide(text, big)...) }, "F is in UTF-16; run `iconv -f UTF-16 -t UTF-8 F > F.new && cp F.new F && rm F.new`", 2},
		{"UTF-16 without a mark", func(*testing.T) []byte { return wide(text, little) }, "F is in UTF-16; run `iconv -f UTF-16LE -t UTF-8 F > F.new && cp F.new F && rm F.new`", 2},
		{"UTF-16, big endian without a mark", func(*testing.T) []byte { return wide(text, big) }, "F is in UTF-16; run `iconv -f UTF-16BE -t UTF-8 F > F.new && cp F.new F && rm F.new`", 2},
		{"two blocks on a line", func(*testing.T) []byte { return join(strings.TrimSuffix(one, "\n"), one) }, "block 2 of F begins on line L, where the block before it ends; run `sed -i 's/----------BEGIN /-----\\n-----BEGIN /g' F`", 2},
		{"indented", func(*testing.T) []byte { return join("    ", strings.ReplaceAll(text, "\n", "\n    ")) }, "block 1 of F is indented on line 1; run `sed -i 's/^[[:blank:]]*//' F`", 2},
		{"escaped line ends", func(*testing.T) []byte { return join(strings.ReplaceAll(text, "\n", `\n`), "\n") }, "F has \\n in place of line ends; run `sed -i 's/\\\\n/\\n/g' F`", 2},
		{"JSON with a certificate", func(*testing.T) []byte { return join(`{"certificate":"`, strings.ReplaceAll(text, "\n", `\n`), `"}`) }, "F is JSON, not PEM; export the certificate and the key from the program that wrote it", 0},
		{"text before a block", func(*testing.T) []byte { return join("tls.crt: |", text) }, "block 1 of F has other text before it on line 1; copy the file again", 0},
		{"DER", func(*testing.T) []byte { return der }, "F is a certificate in DER form; run `openssl x509 -inform DER -in F -out F.new && cp F.new F && rm F.new`", 1},
		{"key in DER", func(*testing.T) []byte { return keyBlock.Bytes }, "F is a private key in DER form; run `openssl pkey -inform DER -in F -out F.new && cp F.new F && rm F.new`", 1},
		{"key in DER with a passphrase", func(t *testing.T) []byte {
			return openssl(t, key, "pkcs8", "-topk8", "-outform", "DER", "-passout", "pass:secret")
		}, "F is a private key in DER form; run `openssl pkey -inform DER -in F -out F.new && cp F.new F && rm F.new`", 1},
		{"short key in DER", func(t *testing.T) []byte { return openssl(t, key, "pkey", "-traditional", "-outform", "DER") }, "F is a private key in DER form; run `openssl pkey -inform DER -in F -out F.new && cp F.new F && rm F.new`", 1},
		{"request in DER", func(t *testing.T) []byte {
			return openssl(t, key, "req", "-new", "-key", "/dev/stdin", "-subj", "/CN=x", "-outform", "DER")
		}, "F is a certificate request; send it to an authority, and use the certificate that comes back", 0},
		{"PFX", func(t *testing.T) []byte {
			in := filepath.Join(t.TempDir(), "both.pem")
			write(t, in, both)
			return openssl(t, nil, "pkcs12", "-export", "-in", in, "-passout", "pass:secret")
		}, "F is PKCS#12 (PFX); run `openssl pkcs12 -in F -nokeys -out S.crt.pem` and `openssl pkcs12 -in F -nocerts -nodes -out S.key.pem`, and use those two files", 2},
		{"PKCS7 in DER", func(t *testing.T) []byte {
			return openssl(t, chain, "crl2pkcs7", "-nocrl", "-certfile", "/dev/stdin", "-outform", "DER")
		}, "F is PKCS#7 in DER form; run `openssl pkcs7 -inform DER -print_certs -in F -out S.crt.pem`, and use that file", 2},
		{"other DER", func(*testing.T) []byte { return []byte("\x30\x82\x00\x03\x02\x01\x01") }, "F is in DER form, but neither a certificate nor a key; bring it as PEM", 0},
		{"half a DER certificate", func(*testing.T) []byte { return der[:100] }, "F is in DER form, but neither a certificate nor a key; bring it as PEM", 0},
		{"ZIP", func(*testing.T) []byte { return []byte("PK\x03\x04\x00\x00") }, "F is a ZIP archive; unpack it, and take the PEM files in it (authorities often name them after nginx)", 0},
		{"gzip", func(*testing.T) []byte { return []byte("\x1f\x8b\x08\x00") }, "F is compressed with gzip; unpack it, and take the PEM files in it", 0},
		{"Java", func(*testing.T) []byte { return []byte("\xfe\xed\xfe\xed\x00\x00\x00\x02") }, "F is a Java key store; export its certificate and key with `keytool -importkeystore -deststoretype PKCS12`", 0},
		{"unknown binary", func(*testing.T) []byte { return []byte("\x7fELF\x00\x01\x00") }, "F is a binary file of an unknown kind; bring it as text (PEM for certificates and keys)", 0},
		{"page of a login", func(*testing.T) []byte { return []byte("\n<!DOCTYPE html><html><title>Sign in</title></html>") }, "F is an HTML page, perhaps of a login; download the file itself", 0},
		{"page without a doctype", func(*testing.T) []byte { return []byte("<!-- x --><HTML lang=en>") }, "F is an HTML page, perhaps of a login; download the file itself", 0},
		{"JSON", func(*testing.T) []byte { return []byte(`{"letsencrypt":{}}`) }, "F is JSON, not PEM; export the certificate and the key from the program that wrote it", 0},
		{"base64 of PEM", func(*testing.T) []byte { return []byte(base64.StdEncoding.EncodeToString(chain)) }, "F is a PEM file in base64, as Kubernetes stores it; run `base64 -d F > F.new && cp F.new F && rm F.new`", 2},
		{"base64 alone", func(*testing.T) []byte { return []byte(base64.StdEncoding.EncodeToString(der)) }, "F lacks the lines -----BEGIN …----- and -----END …----- around its base64; copy the file again", 0},
		{"nonsense", func(*testing.T) []byte { return []byte("nonsense") }, "F has no PEM block (-----BEGIN …-----); copy the file again", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "tls.file")
			data := tt.data(t)
			write(t, path, data)
			short := func(err error) string {
				if err == nil {
					return ""
				}
				line := regexp.MustCompile(`line [0-9]{2}`).ReplaceAllString(err.Error(), "line L")
				return strings.NewReplacer(path, "F", strings.TrimSuffix(path, ".file"), "S").Replace(line)
			}
			blocks, err := load(path)
			if short(err) != tt.want {
				t.Fatalf("got  %s\nwant %s", short(err), tt.want)
			}
			if err == nil {
				if len(blocks) != tt.blocks {
					t.Errorf("%d blocks, want %d", len(blocks), tt.blocks)
				}
				return
			}
			if tt.blocks == 0 {
				return
			}
			for _, command := range commands.FindAllStringSubmatch(err.Error(), -1) {
				shell(t, dir, command[1], "secret\n")
			}
			if out := strings.TrimSuffix(path, ".file") + ".crt.pem"; exists(out) {
				path = out
			}
			blocks, err = load(path)
			if err != nil || len(blocks) != tt.blocks {
				t.Errorf("after the command: %d blocks, %v; want %d", len(blocks), err, tt.blocks)
			}
			for _, b := range blocks {
				if b.Err != nil {
					t.Error(b.Err)
				}
			}
			if info, err := os.Stat(path); err != nil || path[len(path)-4:] == "file" && info.Mode().Perm() != 0o600 {
				t.Errorf("the command changes the mode: %v, %v", info, err)
			}
		})
	}
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

func load(path string) ([]filekind.Block, error) {
	data, err := filekind.Read(path)
	if err != nil {
		return nil, err
	}
	return filekind.Blocks(path, data)
}

// A missing file keeps its error, and a directory has a cause.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	if _, err := filekind.Read(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	_, err := filekind.Read(dir)
	if want := "read " + dir + ": is a directory; Docker makes a directory when the host has no such file: remove the directory, and put the file there"; !errors.Is(err, syscall.EISDIR) || err.Error() != want {
		t.Errorf("a directory: %v, want %s", err, want)
	}
}

// All blocks are counted, and each damaged one has its place and its cause.
func TestDamagedBlocks(t *testing.T) {
	one := string(testkit.ChainPEM(testkit.SelfSigned(t, "derp.example.com")))
	const key = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n"
	text := one + one[:200] + "\n" + strings.Replace(one, "END CERTIFICATE", "END CERTIFICATES", 1) + strings.Replace(one, "MII", "M*I", 1) + key + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" + "-----BEGIN "
	blocks, err := filekind.Blocks("F", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"",
		"block 2 of F (line L) is damaged: its line -----END CERTIFICATE----- is missing; copy the file again",
		"block 3 of F (line L) is damaged: its END line is not that of CERTIFICATE; copy the file again",
		"block 4 of F (line L) is damaged: what is between BEGIN and END is not whole base64; copy the file again",
		"", // encrypted
		"block 6 of F (line L) is damaged: x509: malformed certificate; copy the file again",
		"block 7 of F (line L) is damaged: its line -----END ----- is missing; copy the file again",
	}
	if len(blocks) != len(want) {
		t.Fatalf("%d blocks, want %d", len(blocks), len(want))
	}
	for i, b := range blocks {
		err := b.Err
		if b.Label == "CERTIFICATE" {
			_, err = b.Certificate()
		}
		got := ""
		if err != nil {
			got = regexp.MustCompile(`line [0-9]+`).ReplaceAllString(err.Error(), "line L")
		}
		if got != want[i] || b.Number != i+1 || b.IsKey() != (i == 4) || b.Encrypted != (i == 4) {
			t.Errorf("%+v: %s\nwant %s", b, got, want[i])
		}
		if lines := strings.Split(text, "\n"); !strings.HasPrefix(lines[b.Line-1], "-----BEGIN ") {
			t.Errorf("block %d is not on line %d", b.Number, b.Line)
		}
	}
}

// Windows stores PKCS#7 under the label of a certificate.
func TestPKCS7AsCertificate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "my chain's.p7b")
	p7 := openssl(t, testkit.ChainPEM(testkit.SelfSigned(t, "derp.example.com")), "crl2pkcs7", "-nocrl", "-certfile", "/dev/stdin")
	write(t, path, bytes.ReplaceAll(p7, []byte(" PKCS7-"), []byte(" CERTIFICATE-")))
	blocks, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = blocks[0].Certificate()
	if err == nil || !strings.HasPrefix(err.Error(), "block 1 of "+path+" is PKCS#7 under the label of a certificate; run `") {
		t.Fatal(err)
	}
	shell(t, dir, commands.FindStringSubmatch(err.Error())[1], "")
	if list, err := filekind.Certificates(path); err != nil || len(list) != 1 {
		t.Errorf("after the command: %d certificates, %v", len(list), err)
	}
}

// Certificates refuses what it would leave out otherwise.
func TestCertificates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "roots.pem")
	self := testkit.SelfSigned(t, "derp.example.com")
	one := string(testkit.ChainPEM(self))
	for text, want := range map[string]string{
		one + one:                       "",
		string(testkit.KeyPEM(t, self)): path + " has no certificate, and begins with PRIVATE KEY; put PEM certificates there",
		one + strings.ReplaceAll(one, "END", "FIN"): "block 2 of " + path + " (line ",
		"nonsense": path + " has no PEM block",
		"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n": "block 1 of " + path + " (line 1) is a certificate that clients cannot read: x509: malformed ",
	} {
		write(t, path, []byte(text))
		list, err := filekind.Certificates(path)
		if want == "" && (err != nil || len(list) != 2) || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%d certificates, %v; want %q", len(list), err, want)
		}
	}
}

// FuzzBlocks asserts that every file has blocks or a message, and that the blocks
// agree with encoding/pem.
func FuzzBlocks(f *testing.F) {
	self := testkit.SelfSigned(f, "derp.example.com")
	one := string(testkit.ChainPEM(self))
	for _, seed := range []string{
		one, one + one, strings.TrimSpace(one) + one, "\xef\xbb\xbf" + one, string(self.Certificate[0]), string(wide(one, little)), "", "{", "MII", "LS0tLS1",
		one[:90], "-----BEGIN -----", "-----BEGIN A-----\n-----END A-----", "\x30\x80\x02\x01\x03\x30\x80\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01", "PK\x03\x04",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		blocks, err := filekind.Blocks("F", data)
		if (err == nil) != (len(blocks) > 0) {
			t.Fatalf("%d blocks, %v", len(blocks), err)
		}
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an empty message")
			}
			return
		}
		if n := bytes.Count(data, []byte("-----BEGIN ")); n != len(blocks) {
			t.Errorf("%d blocks, want %d", len(blocks), n)
		}
		var good [][]byte
		for i, b := range blocks {
			if b.Number != i+1 || b.Line < 1 {
				t.Errorf("%+v", b)
			}
			if b.Err == nil {
				good = append(good, b.DER)
			}
			_, _ = b.Certificate()
		}
		for rest := data; ; {
			var p *pem.Block
			if p, rest = pem.Decode(rest); p == nil {
				break
			}
			found := false
			for _, der := range good {
				found = found || bytes.Equal(der, p.Bytes)
			}
			if !found {
				t.Errorf("encoding/pem decodes another block, %q", p.Type)
			}
		}
	})
}
