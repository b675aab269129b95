const canvas = element.querySelector('canvas');
const pen = canvas.getContext('2d', { willReadFrequently: true });
let last = null;
const clear = () => { pen.fillStyle = '#000'; pen.fillRect(0, 0, canvas.width, canvas.height); };
const at = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
const draw = (event) => {
  const [x, y] = at(event);
  pen.strokeStyle = '#fff'; pen.lineWidth = canvas.width / 9; pen.lineCap = 'round'; pen.lineJoin = 'round';
  pen.beginPath(); pen.moveTo(...(last || [x, y])); pen.lineTo(x, y); pen.stroke();
  last = [x, y];
};
canvas.addEventListener('pointerdown', (event) => { canvas.setPointerCapture(event.pointerId); last = null; draw(event); });
canvas.addEventListener('pointermove', (event) => { if (event.buttons) draw(event); });
element.querySelector('.clear').addEventListener('click', clear);
element.querySelector('.use').addEventListener('click', () => trigger('click', { picture: canvas.toDataURL('image/png') }));
clear();
