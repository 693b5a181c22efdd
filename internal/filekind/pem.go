package filekind

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"strings"
)

// Block is one PEM block of a file.
type Block struct {
	Path   string
	Number int // 1 for the first block in the file
	Line   int // of BEGIN; 1 for the first line
	Label  string

	// DER is the content; nil if Err is not nil. A key with a passphrase is
	// encrypted if Encrypted is set.
	DER       []byte
	Encrypted bool

	// Err says that the block is damaged, and how.
	Err error
}

func (b Block) String() string { return fmt.Sprintf("block %d of %s", b.Number, b.Path) }

// IsKey reports whether the label is one of a private key.
func (b Block) IsKey() bool {
	return b.Label == "PRIVATE KEY" || strings.HasSuffix(b.Label, " PRIVATE KEY")
}

// Certificate parses a block with the label CERTIFICATE.
func (b Block) Certificate() (*x509.Certificate, error) {
	if b.Err != nil {
		return nil, b.Err
	}
	c, err := x509.ParseCertificate(b.DER)
	switch {
	case err == nil:
		return c, nil
	case kindOf(b.DER) == pkcs7:
		return nil, fmt.Errorf("%s is PKCS#7 under the label of a certificate; run `%s`", b, Replace("sed 's/ CERTIFICATE-/ PKCS7-/' "+Quote(b.Path)+" | openssl pkcs7 -print_certs -out", b.Path))
	}
	if b.whole() {
		return nil, fmt.Errorf("%s (line %d) is a certificate that clients cannot read: %w; make it again, for %s", b, b.Line, err, GoodKeys)
	}
	return nil, fmt.Errorf("%s (line %d) is damaged: %w; copy the file again", b, b.Line, err)
}

// GoodKeys are the keys that every client accepts.
const GoodKeys = "an RSA key of 2048 bits or an ECDSA key with P-256"

// Key parses a block of a private key.
func (b Block) Key() (any, error) {
	if b.Err != nil {
		return nil, b.Err
	}
	key, err := parseKey(b.DER)
	switch {
	case err == nil:
		return key, nil
	case b.whole():
		return nil, fmt.Errorf("%s (line %d) is a key that clients cannot use: %w; make the key and the certificate again, with %s", b, b.Line, err, GoodKeys)
	}
	return nil, fmt.Errorf("%s (line %d) is not a private key that can be read; copy the file again", b, b.Line)
}

// whole reports whether nothing of the content is missing.
func (b Block) whole() bool {
	var value asn1.RawValue
	rest, err := asn1.Unmarshal(b.DER, &value)
	return err == nil && len(rest) == 0
}

// Certificates returns the certificates of a file. It refuses a damaged one, and a
// file without any.
func Certificates(path string) ([]*x509.Certificate, error) {
	data, err := Read(path)
	if err != nil {
		return nil, err
	}
	blocks, err := Blocks(path, data)
	if err != nil {
		return nil, err
	}
	var list []*x509.Certificate
	for _, b := range blocks {
		if b.Label != "CERTIFICATE" {
			continue
		}
		c, err := b.Certificate()
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s has no certificate, and begins with %s; put PEM certificates there", path, blocks[0].Label)
	}
	return list, nil
}

const (
	begin = "-----BEGIN "
	end   = "-----END "
)

// Blocks returns all blocks of a file, damaged ones too. The error
// is about a file without a block, or about a block that does not begin on a line of
// its own. Other programs read such a file in part.
func Blocks(path string, data []byte) ([]Block, error) {
	if err := Text(path, data); err != nil {
		return nil, err
	}
	switch escaped := bytes.Contains(data, []byte(`-----\n`)); {
	case escaped && bytes.TrimSpace(data)[0] == '{':
		return nil, noBlock(path, data)
	case escaped:
		return nil, fmt.Errorf("%s has \\n in place of line ends; run `sed -i 's/\\\\n/\\n/g' %s`", path, Quote(path))
	}
	var list []Block
	for at := bytes.Index(data, []byte(begin)); at >= 0; {
		next := bytes.Index(data[at+1:], []byte(begin))
		segment := data[at:]
		if next >= 0 {
			segment = data[at : at+1+next]
		}
		b := block(path, segment)
		b.Number = len(list) + 1
		b.Line = bytes.Count(data[:at], []byte("\n")) + 1
		if err := onItsLine(b, data[bytes.LastIndexByte(data[:at], '\n')+1:at]); err != nil {
			return nil, err
		}
		if b.Err != nil {
			b.Err = fmt.Errorf("%s (line %d) is damaged: %w; copy the file again", b, b.Line, b.Err)
		}
		list = append(list, b)
		if next < 0 {
			break
		}
		at += 1 + next
	}
	if len(list) == 0 {
		return nil, noBlock(path, data)
	}
	return list, nil
}

// block decodes a segment that begins with BEGIN and goes on until the next one.
func block(path string, segment []byte) Block {
	b := Block{Path: path}
	label, _, _ := strings.Cut(string(segment[len(begin):]), "\n")
	b.Label, _, _ = strings.Cut(label, "-----")
	decoded, _ := pem.Decode(segment)
	switch {
	case decoded != nil:
		b.DER, b.Label = decoded.Bytes, decoded.Type
		b.Encrypted = b.Label == "ENCRYPTED PRIVATE KEY" || strings.Contains(decoded.Headers["Proc-Type"], "ENCRYPTED")
	case !bytes.Contains(segment, []byte(end)):
		b.Err = fmt.Errorf("its line %s%s----- is missing", end, b.Label)
	case !bytes.Contains(segment, []byte(end+b.Label+"-----")):
		b.Err = fmt.Errorf("its END line is not that of %s", b.Label)
	default:
		b.Err = fmt.Errorf("what is between BEGIN and END is not whole base64")
	}
	return b
}

// onItsLine refuses a block with text before it on the line of BEGIN.
func onItsLine(b Block, before []byte) error {
	switch {
	case len(before) == 0:
		return nil
	case bytes.Contains(before, []byte(end)):
		return fmt.Errorf("%s begins on line %d, where the block before it ends; run `sed -i 's/----------BEGIN /-----\\n-----BEGIN /g' %s`", b, b.Line, Quote(b.Path))
	case len(bytes.TrimSpace(before)) == 0:
		return fmt.Errorf("%s is indented on line %d; run `sed -i 's/^[[:blank:]]*//' %s`", b, b.Line, Quote(b.Path))
	}
	return fmt.Errorf("%s has other text before it on line %d; copy the file again", b, b.Line)
}

// noBlock names the kind of a text without PEM blocks.
func noBlock(path string, data []byte) error {
	text := bytes.TrimSpace(data)
	switch {
	case bytes.HasPrefix(text, []byte("LS0tLS1")): // "-----" in base64
		return fmt.Errorf("%s is a PEM file in base64, as Kubernetes stores it; run `%s`", path, Replace("base64 -d "+Quote(path)+" >", path))
	case bytes.HasPrefix(text, []byte("MII")): // a SEQUENCE in base64
		return fmt.Errorf("%s lacks the lines -----BEGIN …----- and -----END …----- around its base64; copy the file again", path)
	case text[0] == '{':
		return fmt.Errorf("%s is JSON, not PEM; export the certificate and the key from the program that wrote it", path)
	}
	return fmt.Errorf("%s has no PEM block (-----BEGIN …-----); copy the file again", path)
}
